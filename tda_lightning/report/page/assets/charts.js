"use strict";
drawCharts(() => gallery.chosen && showTrajectory(data.queries.indexOf(gallery.chosen)));
