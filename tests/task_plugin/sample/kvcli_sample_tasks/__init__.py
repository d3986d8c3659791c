"""Tasks in a package of their own: the definitions beside this file, and a class in counting.py."""
