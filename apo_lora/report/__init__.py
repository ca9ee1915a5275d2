"""One self-contained HTML page of a run, or of several compared. No torch.

runs.py      run directories as they were recorded      curves.py  metrics over steps: running means, bands of seeds
groups.py    runs that differ only in their seed         credit.py  what DADS and STCR did
chart.py     numbers into places of an SVG               cost.py    where time and memory went
answers.py   which answers are shown (evaluation/gallery.py shows them)
page.py      all of it into page/report.html             write.py   the verb
"""
