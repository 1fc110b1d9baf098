"""Models of other libraries: PyJuice and libcirkit, read and written where formats allow.

The modules import those libraries inside functions; distpc needs neither.
"""
