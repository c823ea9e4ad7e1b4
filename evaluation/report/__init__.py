"""Results of a comparison as tables, plots and pages."""
