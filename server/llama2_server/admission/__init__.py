"""Admission: may this request run, and when: accounts, quota, request queue."""
