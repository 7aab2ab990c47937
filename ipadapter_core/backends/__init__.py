"""Hosts: each backend turns its host's attention call into a SiteCall and back; nothing else knows the host."""
