"""The passes, one file each; compiler/pipeline.py puts them in order."""
