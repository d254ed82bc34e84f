"""Solvers and starts behind `fit_law` and `fit_form`."""
