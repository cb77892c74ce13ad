// Follows runs that are going on: asks the page's own server for news, and renews the parts that changed.
"use strict";
(() => {
  const status = document.getElementById("live"), said = document.getElementById("live-said");
  let mark = "", lost = 0, announced = 0;

  function renew(parts) {
    for (const [id, html] of Object.entries(parts)) {
      const part = document.querySelector(`[data-part="${id}"]`);
      if (!part || part.dataset.mark === String(html.length) + html) continue;
      const open = new Set([...part.querySelectorAll("details[open]")].map((one) => one.id));
      const focus = part.contains(document.activeElement) ? document.activeElement.id : "";
      part.innerHTML = html; // of this page's own server, which escapes what comes from files; its policy runs no script in it
      part.dataset.mark = String(html.length) + html;
      for (const one of part.querySelectorAll("details")) if (open.has(one.id)) one.open = true;
      if (focus) document.getElementById(focus)?.focus();
    }
  }

  async function ask() {
    try {
      const answer = await fetch("news", { headers: mark ? { "If-None-Match": mark } : {}, cache: "no-store" });
      if (answer.status === 200) {
        mark = answer.headers.get("ETag") || "";
        const news = await answer.json();
        renew(news.parts);
        report.update(news.data);
        status.textContent = news.said;
        if (Date.now() - announced > 30000 || news.ended) { said.textContent = news.said; announced = Date.now(); } // not at every step
      } else if (answer.status !== 304) throw new Error(String(answer.status));
      lost = 0;
      status.parentElement.classList.remove("gone");
    } catch (error) {
      lost += 1;
      status.parentElement.classList.add("gone");
      status.textContent = "The server of this page no longer answers: what is shown is the last that it said.";
    }
    setTimeout(ask, lost ? Math.min(30000, 2000 * lost) : document.hidden ? 15000 : 2000);
  }
  setTimeout(ask, 2000);
})();
