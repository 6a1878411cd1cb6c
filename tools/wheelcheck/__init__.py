"""What our wheel must look like; see tools/check_wheel.py.

Each check yields problems, one line for each. Whatever a check does not know is
a problem: a new load command or library is looked at by a person first.
"""
