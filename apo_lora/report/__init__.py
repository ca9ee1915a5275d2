"""One self-contained HTML page of a run, or of several compared.

runs.py     run directories as they were recorded     comparison.py  means over seeds, differences by seed, intervals
groups.py   runs that differ only in their seed       credit.py      what DADS and STCR did
charts.py   curves and credit as SVG                  cost.py        where time and memory went
answers.py  which answers are shown (evaluation/gallery.py shows them)
page.py     all of it into page/report.html           write.py       the verb
"""
