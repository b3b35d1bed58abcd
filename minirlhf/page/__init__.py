"""A run as one page to look at: curves, answers side by side, and responses token by token.

`collect` reads what the runs left, `answers` asks the policies, `write` makes one HTML file of both
with page.html, page.css, curves.js and page.js. Imported by the pipeline at its end, by no trainer.
"""
