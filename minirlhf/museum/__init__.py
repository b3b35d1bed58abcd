"""THE MUSEUM of classic mistakes: wrong functions that well-known code contained.

Nothing here is on the trainers' path, and nothing there imports it. `mistakes` holds the wrong
functions, `exhibits` their labels, `effect` measures, and `python -m minirlhf.museum` shows them.
"""
