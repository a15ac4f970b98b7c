"""The native CPU forward pass (C++) and its ctypes binding."""
