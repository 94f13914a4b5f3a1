"""Tools for learning and finding out: order of solvers, the doctor, the demo."""
