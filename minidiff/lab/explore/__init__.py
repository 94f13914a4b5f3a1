"""A page to explore samplers in: one HTML file that needs neither a server nor a network.

`tables` turns schedulers into tables of coefficients, `trace` a network into a list of operators;
`page` puts both into `page.html`, whose scripts multiply and add. There is no sampler in them.
"""

from minidiff.lab.explore.build import Page, page

__all__ = ["Page", "page"]
