// Search over TITLES and SECTIONS of search-index.js: every word has to begin a word of the section.
(function () {
  const box = document.getElementById('search'), list = document.getElementById('found');
  if (!box || typeof SECTIONS === 'undefined') return;
  const up = (document.querySelector('script[src$="search.js"]').getAttribute('src').match(/\.\.\//g) || []).join('');

  function score(section, words) {
    const [page, heading, , text] = section, title = TITLES[page].toLowerCase();
    let total = 0;
    for (const w of words) {
      if (!(' ' + text).includes(' ' + w)) return 0;
      total += 1 + 4 * heading.toLowerCase().includes(w) + 2 * title.includes(w) + (' ' + text + ' ').includes(' ' + w + ' ');
    }
    return total;
  }

  function item(section) {
    const li = document.createElement('li'), a = document.createElement('a');
    a.href = up + section[0] + (section[2] ? '#' + section[2] : '');
    a.textContent = TITLES[section[0]] + (section[1] && section[1] !== TITLES[section[0]] ? ': ' + section[1] : '');
    li.append(a);
    return li;
  }

  function search() {
    const words = box.value.toLowerCase().split(/\s+/).filter(w => w.length > 1);
    const best = words.length ? SECTIONS.map(s => [score(s, words), s]).filter(p => p[0])
      .sort((a, b) => b[0] - a[0]).slice(0, 12) : [];
    list.replaceChildren(...best.map(p => item(p[1])));
    if (words.length && !best.length) list.append(Object.assign(document.createElement('li'), {textContent: 'Nothing found'}));
    list.hidden = !words.length;
  }

  box.addEventListener('input', search);
  box.addEventListener('keydown', e => {
    const first = list.querySelector('a');
    if (e.key === 'Enter' && first) location.href = first.href;
    if (e.key === 'Escape') { box.value = ''; search(); }
    if (e.key === 'ArrowDown' && first) { first.focus(); e.preventDefault(); }
  });
  document.addEventListener('keydown', e => {
    if (e.key === '/' && !/input|textarea/i.test(document.activeElement.tagName)) { box.focus(); e.preventDefault(); }
  });
})();
