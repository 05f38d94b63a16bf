"""What makes a site of the documentation: references and pictures from the code, links to all of the repository.

``make docs`` calls mkdocs, which calls ``docs.site.hook``; nothing that is made here is written beside the sources.
"""
