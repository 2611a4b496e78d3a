/* What the theme leaves out for keyboards and screen readers. */
addEventListener("load", () => {
  document.querySelectorAll("[role=heading]").forEach((heading) => (heading.ariaLevel = "2"));
  const names = { "sidebar-drawer": "All pages", "toc-drawer": "This page" };
  for (const [kind, name] of Object.entries(names)) {
    document.querySelectorAll(`aside.${kind}`).forEach((aside) => (aside.ariaLabel = name));
  }
  document.getElementById("search-results")?.insertAdjacentHTML("beforebegin", "<h1>Search</h1>");
  /* Whatever scrolls can be scrolled by the arrow keys. */
  const reach = () =>
    document.querySelectorAll("article :is(pre, .table-wrapper, div.math, p:has(> img))").forEach((box) => {
      if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
      else box.removeAttribute("tabindex");
    });
  reach();
  addEventListener("resize", reach);
});
