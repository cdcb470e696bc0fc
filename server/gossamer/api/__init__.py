"""The HTTP surface: routes, keys, wiring. The only room that knows every other one."""
