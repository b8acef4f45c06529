"""What a run came to: `report.json`, figures and the model card.

`report` is the report itself, `results` makes it of a finished run and writes everything; `plots` and `class_plots`
draw, `card` and `method_text` write.
"""
