"""What a host has free, read from its kernel and its drivers. No program is run.

One file a source; where files are read, the root of the file system is a parameter, so that tests
can pass a captured tree. Absent is not broken: no hardware reads as nothing, a value that the
kernel or the driver leaves out as ``None``, and what is there but cannot be read as ``None`` with
a line that says why.

``reader.Reader`` puts them together. Each value comes as a ``sample.Reading``, which knows its
source and the time it took, for ``chiffon agent probe``.
"""
