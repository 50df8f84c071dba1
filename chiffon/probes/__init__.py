"""What a host has free, read from its kernel and its drivers. No program is run.

One file a source, each with a ``read``; where files are read, their root is a parameter, so that
tests can pass a captured tree. Absent is not broken: no hardware reads as nothing, a value that
the driver leaves out as ``None``, and what is there but cannot be read as an error that says so.

``reader.Reader`` puts them together.
"""
