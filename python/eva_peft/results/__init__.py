"""What a pass found: kept, changed, drawn, written as a report."""
