"""Quality of networks that share parameters, against what one would do by hand."""
