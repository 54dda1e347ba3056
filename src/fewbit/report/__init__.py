"""Everything that a person reads: text, tables, model card, report page, charts."""
