"""Vultus, the offline half: prepare, train, measure, export."""
