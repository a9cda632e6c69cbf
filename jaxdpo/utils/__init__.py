"""Small tools without any machine learning: console, files, text, trees, manifests, HTML pages."""
