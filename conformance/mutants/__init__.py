"""Servers with one wrong behavior each: proxies in front of a correct server, which the cases must find."""
