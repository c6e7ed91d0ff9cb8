"""Shipped recipes, one YAML file each; :func:`lolcats.config.recipe_names` lists them."""
