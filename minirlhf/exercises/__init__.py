"""EXERCISES with solutions: functions to write, questions for pen and paper, bugs to find.

`python -m minirlhf.exercises` lists them. `exercise` says what an exercise is, `checking` how an
attempt is checked. Each group is a module: `tokens`, `attention`, `losses`, `penalty`, `rl`,
`metrics`, `groups`; `paper`; `bugs`, whose runs `record` made; and `evening`, the last task.
"""
