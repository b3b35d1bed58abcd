"""What it takes to run the stages reliably and fast: options, run folder, state, processes, speed.

The files of the reader's path call this folder by a few plain functions; it imports none of them.
"""
