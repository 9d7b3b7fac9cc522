"""The record: every SQL statement of the service."""
