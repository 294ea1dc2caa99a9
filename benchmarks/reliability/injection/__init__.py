"""Inject faults into stores: kills, power cuts, failing calls, crowds of writers, damaged files."""
