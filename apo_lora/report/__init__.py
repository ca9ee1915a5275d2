"""One self-contained HTML page of a run, or of several compared.

runs.py     run directories as they were recorded, and those that differ only in their seed
charts.py   curves, and what DADS and STCR did, as SVG
comparison.py  means over seeds, differences by seed, intervals     cost.py  where time and memory went
recomputed.py  the credit of completions.jsonl, computed again
page.py     the verb: all of it into page/report.html (evaluation/gallery.py shows the answers)
"""
