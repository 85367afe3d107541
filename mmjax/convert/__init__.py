"""Conversion of other people's data into data sets that mmjax reads."""
