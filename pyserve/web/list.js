// The list of conversations.

const SURE_MS = 3000;

function itemOf({ id, title, live }, isShown, onRemove) {
  const link = document.createElement("a");
  const words = document.createElement("span");
  link.href = `#${encodeURIComponent(id)}`;
  words.textContent = title || "Untitled";
  if (isShown) link.setAttribute("aria-current", "page");
  const mark = document.createElement("span");
  mark.className = "spinner";
  mark.hidden = !live;
  mark.setAttribute("role", "img");
  mark.setAttribute("aria-label", "is being answered");
  link.append(mark, words);
  const remove = document.createElement("button");
  remove.className = "icon remove";
  remove.textContent = "✕";
  remove.setAttribute("aria-label", `Delete ${title || "Untitled"}`);
  remove.addEventListener("click", () => (remove.dataset.sure ? onRemove(id) : askAgain(remove)));
  const item = document.createElement("li");
  item.dataset.conversationId = id;
  item.dataset.live = live;
  item.append(link, remove);
  return item;
}

/** One press too many must not lose a conversation. */
function askAgain(button) {
  button.dataset.sure = "asked";
  button.textContent = "Delete?";
  setTimeout(() => {
    delete button.dataset.sure;
    button.textContent = "✕";
  }, SURE_MS);
}

/** Show these in `root`. Whoever is in the list with the keyboard stays where he is. */
export function showList(root, conversations, shownId, onRemove) {
  const items = conversations.map((one) => itemOf(one, one.id === shownId, onRemove));
  const focused = document.activeElement?.closest?.("li")?.dataset.conversationId;
  root.replaceChildren(...items);
  if (focused) items.find((item) => item.dataset.conversationId === focused)?.firstChild.focus();
}
