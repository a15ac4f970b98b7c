"""Runs cases against a client: a scripted server that sends faulty bytes, and a program that makes the calls."""
