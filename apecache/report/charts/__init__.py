"""Draw charts as inline SVG.

A page loads nothing and follows light and dark. matplotlib's SVG has fixed colors, a style for all
elements of the page, and references by URL; Optuna's own plots need scripts.
"""
