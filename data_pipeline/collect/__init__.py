"""Text that is not there yet: articles of a MediaWiki, and question-answer pairs made from documents."""
