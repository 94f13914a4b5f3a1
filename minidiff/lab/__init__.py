"""Tools for learning and finding out: order of solvers, the ledger, the doctor, the demo."""
