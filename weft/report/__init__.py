"""Reports: what `weft fit` found, as data, as a table and as one offline page."""
