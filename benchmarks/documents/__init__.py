"""The tables of docs/measured.md and docs/scaling.md, a file each; `pages.py` says which stands where."""
