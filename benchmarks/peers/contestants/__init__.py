"""One program for each contestant, as somebody who knows it well would write it.

Each reads a task, trains, marks the end of every step, and leaves its weights behind. Nothing else
is loaded, so that start-up and memory are its own.
"""
