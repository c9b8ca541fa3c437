"""Reports as plain values, and renderers to text, Markdown, JSON and HTML."""

from batchnorm.report.model import Block as Block
from batchnorm.report.model import Details as Details
from batchnorm.report.model import Finding as Finding
from batchnorm.report.model import Formula as Formula
from batchnorm.report.model import Grid as Grid
from batchnorm.report.model import Heat as Heat
from batchnorm.report.model import Images as Images
from batchnorm.report.model import Plot as Plot
from batchnorm.report.model import Report as Report
from batchnorm.report.model import Row as Row
from batchnorm.report.model import Section as Section
from batchnorm.report.model import Series as Series
from batchnorm.report.model import Table as Table
from batchnorm.report.model import Text as Text
