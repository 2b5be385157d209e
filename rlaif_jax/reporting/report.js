"use strict";
(() => {
  const form = document.getElementById("filters");
  const shown = document.getElementById("shown");
  const cards = Array.from(document.querySelectorAll(".sample"), (card) => ({
    card,
    text: Array.from(card.querySelectorAll(".text"), (text) => text.textContent).join("\n").toLowerCase(),
  }));
  const value = (name) => (form.elements[name] ? form.elements[name].value : "");
  const apply = () => {
    const outcome = value("outcome");
    const truth = value("truth");
    const query = value("query").trim().toLowerCase();
    let count = 0;
    for (const { card, text } of cards) {
      const matches =
        (!outcome || card.dataset.outcome === outcome) &&
        (!truth || card.dataset.truth === truth) &&
        text.includes(query);
      card.hidden = !matches;
      count += matches ? 1 : 0;
    }
    shown.textContent = count + " of " + cards.length;
  };
  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  apply();
})();
