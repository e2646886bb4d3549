"""Pages from records: Markdown, figures, HTML."""
