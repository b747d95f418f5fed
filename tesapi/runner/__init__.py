"""The program that runs one job on a worker: standard library only, Python 3.9 and newer, nothing else of tesapi.

It travels with every job as one text file (see `tesapi.jobs.bundle`).
"""
