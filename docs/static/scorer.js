// Orders what a search finds: flags first, then what went wrong; text of the pages made from code comes last.
var Scorer = {
  score: ([page, , anchor, , score]) => {
    if (anchor.startsWith("#cmdoption")) return score + 20;
    if (page === "troubleshooting") return score + 12;
    return /^(reference\/api|changelog)/.test(page) && !anchor ? score - 3 : score;
  },
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
