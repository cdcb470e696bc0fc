"""What every request passes on its way in, outermost first, as plain ASGI.

`Identify` gives it an id and writes its log line, `Gate` refuses it while the server drains,
`Authenticate` finds out whose it is, `BoundBody` limits the size and the time of its body.
"""
