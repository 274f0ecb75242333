"""Pages to look at: `charts` draws inline SVG, `page` lays out one self-contained HTML file. No scripts, nothing fetched, all text
escaped."""
