"""Is a run the same run on another layout? The table of layouts, and the comparison with one plain process."""
