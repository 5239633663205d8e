"""What speaks HTTP over the store: a package for each dialect, and `workers.py`, which is none. They do not know one
another.
"""
