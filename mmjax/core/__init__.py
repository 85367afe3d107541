"""The modules that every package of mmjax builds on: errors, config, files, parameters and sharding."""
