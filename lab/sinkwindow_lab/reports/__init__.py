"""Runs of many measurements: the tables and their studies, speed with its lower bounds."""
